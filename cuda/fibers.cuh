// A block of CUDA threads on a CPU: the threads are fibers.
//
// Each starts in turn and runs to its first barrier or to its end; the stack of one that has ended serves the next, so a
// kernel without barriers needs a single stack and no switch inside a thread. Fibers are made with makecontext and
// switched with _setjmp and _longjmp, which unlike swapcontext make no system call, as QEMU's coroutines do.
#pragma once

#include <math.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <type_traits>
#include <vector>

#define DUALOP_FUN inline
#define DUALOP_CONST constexpr
#define DUALOP_EXPORT extern "C" __attribute__((visibility("default")))

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // one block runs at a time

struct uint3 { unsigned x, y, z; };
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace dualop::host {

[[noreturn]] inline void die(const char* what) {
    fprintf(stderr, "dualop host kernel: block (%u, %u, %u), thread (%u, %u, %u): %s\n", blockIdx.x, blockIdx.y,
            blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z, what);
    fflush(stderr);
    abort();
}

// Fortified builds redirect _longjmp to a check that takes any jump to another stack for a mistake.
extern "C" [[noreturn]] void dualop_host_jump(jmp_buf, int) __asm__("_longjmp");

[[gnu::noinline]] inline void switch_to(jmp_buf from, jmp_buf to) {
    if (_setjmp(from) == 0) dualop_host_jump(to, 1);
}

struct Fiber {
    jmp_buf at;
    bool entered = false;
};

enum class State : char { ready, at_block_barrier, in_warp, ended };

struct Thread {
    uint3 index;
    State state;
    Fiber* fiber;    // null before the start and after the end
    unsigned mask;   // in_warp: the lanes that meet
    int source;      // in_warp: the lane whose value this one takes
    uint64_t value;  // in_warp: what this lane gives; afterwards what it got
};

struct Warp {
    unsigned live;     // lanes not ended, started or not
    unsigned waiting;  // lanes in_warp
};

constexpr unsigned warp_size = 32;
constexpr size_t stack_bytes = 128 << 10, guard_bytes = 64 << 10;  // the guard is at least a page everywhere

// All that one launch needs. A thread that arrives somewhere last releases the others itself; the scheduler only ever
// looks for threads that are ready.
class Machine {
  public:
    Machine(unsigned block_threads, void (*body_)(void*), void* arguments_)
        : body(body_), arguments(arguments_), threads(block_threads), warps((block_threads + 31) / warp_size),
          fibers(block_threads) {
        void* got = mmap(nullptr, stacks_bytes(), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (got == MAP_FAILED) die("no memory for the threads' stacks");
        stacks = static_cast<char*>(got);
    }
    ~Machine() { munmap(stacks, stacks_bytes()); }
    Machine(const Machine&) = delete;

    void run_block() {
        live = static_cast<unsigned>(threads.size());
        at_barrier = 0;
        for (unsigned t = 0; t < live; t++) {
            uint3 index = {t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y};
            threads[t] = {index, State::ready, nullptr, 0, 0, 0};
        }
        for (unsigned w = 0; w < warps.size(); w++) {
            unsigned lanes = live - w * warp_size;
            warps[w] = {lanes < warp_size ? (1u << lanes) - 1 : ~0u, 0};
        }
        for (bool ran = true; ran && live > 0;) {
            ran = false;
            for (unsigned w = 0; w < warps.size(); w++)
                while (run_warp(w)) ran = true;
        }
        if (live > 0) die_waiting();
    }

    void block_barrier() {
        current->state = State::at_block_barrier;
        at_barrier++;
        release_block();
        if (current->state != State::ready) leave();
    }

    // Meets the other live lanes of `mask` and returns the value that lane `source` gave.
    uint64_t meet(unsigned mask, int source, uint64_t value) {
        unsigned w = number() / warp_size, bit = 1u << lane();
        if (!(mask & bit)) die("warp operation whose mask does not name the calling lane");
        current->state = State::in_warp;
        current->mask = mask, current->source = source, current->value = value;
        warps[w].waiting |= bit;
        release_warp(w, mask);
        if (current->state != State::ready) leave();
        return current->value;
    }

    int lane() const { return static_cast<int>(number() % warp_size); }

  private:
    void (*body)(void*);
    void* arguments;
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    std::vector<Fiber> fibers;
    std::vector<Fiber*> idle;
    size_t made = 0;  // fibers that have a stack
    char* stacks;
    Thread* current = nullptr;
    unsigned live = 0, at_barrier = 0;
    jmp_buf scheduler;

    size_t stacks_bytes() const { return fibers.size() * (stack_bytes + guard_bytes); }
    unsigned number() const { return static_cast<unsigned>(current - threads.data()); }
    void leave() { switch_to(current->fiber->at, scheduler); }

    bool run_warp(unsigned w) {
        bool ran = false;
        unsigned first = w * warp_size, end = first + warp_size;
        if (end > threads.size()) end = static_cast<unsigned>(threads.size());
        for (unsigned t = first; t < end; t++) {
            if (threads[t].state != State::ready) continue;
            ran = true;
            current = &threads[t];
            threadIdx = current->index;
            if (!current->fiber) current->fiber = take_fiber();
            enter(*current->fiber);
        }
        return ran;
    }

    Fiber* take_fiber() {
        if (idle.empty()) return &fibers[made++];
        Fiber* fiber = idle.back();
        idle.pop_back();
        return fiber;
    }

    [[gnu::noinline]] void enter(Fiber& fiber) {
        if (fiber.entered) return switch_to(scheduler, fiber.at);
        fiber.entered = true;
        char* stack = stacks + (&fiber - fibers.data()) * (stack_bytes + guard_bytes) + guard_bytes;
        if (mprotect(stack, stack_bytes, PROT_READ | PROT_WRITE) != 0) die("no memory for a thread's stack");
        ucontext_t context;
        getcontext(&context);
        context.uc_stack.ss_sp = stack;
        context.uc_stack.ss_size = stack_bytes;
        context.uc_link = nullptr;
        makecontext(&context, fiber_main, 0);
        if (_setjmp(scheduler) == 0) setcontext(&context);
    }

    static void fiber_main();

    void run_threads() {  // a fiber's life: each return of leave() brings it the next thread to run
        for (;;) {
            body(arguments);
            idle.push_back(current->fiber);
            end_thread();
            Fiber* fiber = idle.back();
            switch_to(fiber->at, scheduler);
        }
    }

    void end_thread() {
        unsigned w = number() / warp_size;
        current->state = State::ended;
        current->fiber = nullptr;
        warps[w].live &= ~(1u << lane());
        live--;
        for (unsigned lanes = warps[w].waiting; lanes; lanes &= lanes - 1) {  // it may have been the last one awaited
            Thread& waiting = threads[w * warp_size + __builtin_ctz(lanes)];
            if (waiting.state == State::in_warp) release_warp(w, waiting.mask);
        }
        release_block();
    }

    void release_block() {
        if (at_barrier < live || live == 0) return;
        at_barrier = 0;
        for (Thread& thread : threads)
            if (thread.state == State::at_block_barrier) thread.state = State::ready;
    }

    void release_warp(unsigned w, unsigned mask) {
        unsigned meeting = mask & warps[w].live;
        if (meeting & ~warps[w].waiting) return;
        Thread* lanes = &threads[w * warp_size];
        uint64_t got[warp_size];
        for (unsigned rest = meeting; rest; rest &= rest - 1) {
            Thread& thread = lanes[__builtin_ctz(rest)];
            if (thread.mask != mask) return;  // that lane meets others first
            got[__builtin_ctz(rest)] = meeting >> thread.source & 1 ? lanes[thread.source].value : ~uint64_t{0};
        }
        for (unsigned rest = meeting; rest; rest &= rest - 1) {
            Thread& thread = lanes[__builtin_ctz(rest)];
            thread.value = got[__builtin_ctz(rest)];
            thread.state = State::ready;
        }
        warps[w].waiting &= ~meeting;
    }

    [[noreturn]] void die_waiting() {
        unsigned in_warp = 0;
        const Thread* first = nullptr;
        for (const Thread& thread : threads) {
            if (thread.state == State::ended) continue;
            in_warp += thread.state == State::in_warp;
            if (!first) first = &thread;
        }
        threadIdx = first->index;
        char text[200];
        snprintf(text, sizeof text,
                 "barrier that can never be completed: of %u live threads %u wait at __syncthreads and %u in a warp "
                 "operation; this is the first of them",
                 live, at_barrier, in_warp);
        die(text);
    }
};

inline Machine* machine = nullptr;
inline pthread_mutex_t one_launch = PTHREAD_MUTEX_INITIALIZER;  // shared memory and threadIdx exist once
inline thread_local int pending_error = 0;

inline void Machine::fiber_main() { machine->run_threads(); }

inline bool valid(dim3 grid, dim3 block) {  // CUDA's limits, so that a launch which a GPU refuses is refused here too
    constexpr unsigned axis = 65535, rows = 0x7fffffff;
    return grid.x && grid.y && grid.z && grid.x <= rows && grid.y <= axis && grid.z <= axis && block.x && block.y &&
           block.z && block.x <= 1024 && block.y <= 1024 && block.z <= 64 && block.x * block.y * block.z <= 1024;
}

inline void run(dim3 grid, dim3 block, void (*body)(void*), void* arguments) {
    constexpr int invalid_configuration = 9;  // cudaErrorInvalidConfiguration
    if (!valid(grid, block)) {
        pending_error = invalid_configuration;
        return;
    }
    pthread_mutex_lock(&one_launch);
    {
        Machine here(block.x * block.y * block.z, body, arguments);
        machine = &here;
        gridDim = grid, blockDim = block;
        for (blockIdx.z = 0; blockIdx.z < grid.z; blockIdx.z++)
            for (blockIdx.y = 0; blockIdx.y < grid.y; blockIdx.y++)
                for (blockIdx.x = 0; blockIdx.x < grid.x; blockIdx.x++) here.run_block();
        machine = nullptr;
    }
    pthread_mutex_unlock(&one_launch);
}

template <class T> T shuffle(unsigned mask, T value, int source) {
    static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(uint64_t));
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    bits = machine->meet(mask, source, bits);
    memcpy(&value, &bits, sizeof value);
    return value;
}

inline void check_aligned(const void* address, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(address) % bytes == 0) return;
    char text[100];
    snprintf(text, sizeof text, "misaligned access of %zu bytes at %p", bytes, address);
    die(text);
}

}  // namespace dualop::host

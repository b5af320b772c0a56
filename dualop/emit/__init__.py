"""Write one self-contained file in KernelBench's form, for one layout. It knows no torch operator."""

"""Define the language of chains: stages, text, lowering to a program. Know arithmetic, not memory nor backends."""

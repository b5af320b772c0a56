"""The language of chains: stages, text, lowering to a program. It knows arithmetic, and neither memory nor backends."""

"""Write one self-contained file in KernelBench's form. It joins the kernels' sources and knows no torch operator."""

"""Kernels as compiled for a GPU, run on a CPU.

launches.py compiles a launch and runs it; program.py reads PTX; machine.py runs it, with operands.py, arithmetic.py,
accesses.py and products.py for the instructions, memory.py for memory and its checks, matrix.py for the layouts of
matrix operands and traffic.py for what accesses cost.
"""

"""Speed and memory: of the CPU kernels (cpu), of the GPU kernels (gpu), and the tables that the README shows."""

"""What is measured of the library itself: time, memory and orders of convergence."""

BENCHMARKS = ("samplers", "networks", "loading", "features", "frechet")  # against other libraries, by module

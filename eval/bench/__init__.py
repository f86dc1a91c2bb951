"""What is measured of the library itself: time, memory and orders of convergence."""

"""The benchmark of `make quickstart`: handwritten digits, judged by a classifier of them."""

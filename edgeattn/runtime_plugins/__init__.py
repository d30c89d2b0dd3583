"""Native kernels, one folder per kind of device. Each folder has a Python door that finds its libraries."""

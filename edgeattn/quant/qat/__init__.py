"""Quantization-aware training of DeiT at 2 to 4 bits: OFQ (arXiv 2302.02210), and LSQ and LSQ+ as baselines."""

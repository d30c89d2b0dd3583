"""Measurement on a device, the verdict drawn from it, and its record: latency, paired accuracy, report."""

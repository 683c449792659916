"""One machine: training, baselines and evaluation."""

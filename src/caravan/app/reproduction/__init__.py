"""The paper's tables and figures (arXiv:2509.16508), and those it left out: one module an experiment."""

"""Federated training between real machines: what a coordinator and its nodes are given, and do."""

"""Pareto fronts of sparsity and fidelity: compute, describe, draw and save them."""

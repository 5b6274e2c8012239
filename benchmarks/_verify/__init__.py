"""What is right on a GPU, and the page that says so: kernels, memory, conditions, training.

Each file is a step of ``python -m benchmarks gpu``, and writes rows into its results.jsonl; page.py
makes docs/verification.md of the rows that were kept.
"""

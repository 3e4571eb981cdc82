"""What every backend shares: the problem, its checks, the torch operators, and the plain PyTorch reference.

Nothing here imports a backend when it loads, so `import dispatch` costs what `import torch` costs.
"""

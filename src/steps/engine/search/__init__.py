"""Search over configurations of a model's layers with two objectives, loss and memory. Knows no model: NumPy only.

space.py what a configuration is; pareto.py dominance; genetic.py NSGA-II; bayes.py a Gaussian process and expected
improvement; stages.py the three of them one after the other; report.py and plot.py what came of it.
"""

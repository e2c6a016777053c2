"""Run the steps of an LLM fine-tuning pipeline from one command line.

Nothing is imported here on purpose: `steps list` must stay as light as an empty package.
"""

__version__ = "0.1.0"

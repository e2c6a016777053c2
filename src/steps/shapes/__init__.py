"""What a model's shape is and what follows from it by arithmetic: free of torch, so that the front door can ask.

model_config.py the shape itself; hf_config.py and run_config.py read and write it; targets.py its linears by name.
"""

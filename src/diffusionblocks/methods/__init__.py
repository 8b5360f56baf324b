from diffusionblocks.methods.methods import METHODS, Method, find_method, for_method, steps_for_budget

__all__ = ["METHODS", "Method", "find_method", "for_method", "steps_for_budget"]

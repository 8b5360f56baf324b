from diffusionblocks.memory.measure import PeakMemory, measure_peak, profiled_peak

__all__ = ["PeakMemory", "measure_peak", "profiled_peak"]

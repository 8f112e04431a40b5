"""Recorders: the same contract as a device graph (`cuda_graph`) and as an operator tape (`cpu_tape`)."""

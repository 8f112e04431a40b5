"""Recorders: the same contract as a device graph (`graphs.record.cuda`) and as an operator tape (`graphs.record.tape`)."""

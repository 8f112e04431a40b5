"""How far results may be apart: tolerances, and errors judged beside eager's own."""

"""What the experiments share: sampling, rows, tables, progress, and the machine they run on."""

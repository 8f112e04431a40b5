"""Every call: recognise, check, replay; else record; else run the model."""

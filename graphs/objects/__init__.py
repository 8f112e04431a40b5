"""Looking at Python objects without running their code: attributes, entries, what C keeps, whose code a file is."""

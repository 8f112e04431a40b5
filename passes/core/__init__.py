"""What all passes share: aliasing, facts about symbols, names, places in the user's code."""

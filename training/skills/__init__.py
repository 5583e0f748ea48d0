"""One module per skill: how its instances are made, and what decides whether one is held out."""

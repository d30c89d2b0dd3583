"""Model zoo: one file per architecture, official state-dict names."""

"""Jobs that survive anything: their states, the journal that keeps them, their windows, and what runs them."""

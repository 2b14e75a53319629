"""The operator's side: packing models. Never imported by the daemon; needs the extra ``[pack]`` where it says so."""

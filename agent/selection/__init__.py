"""Which variant fits this device: rules with reasons, a prior, measurements, and the choice among them.

Everything here is pure: values in, values out, no clock, no file, no runtime. ``infer.trial`` measures, ``core`` keeps.
``rules`` filters, ``prior`` ranks and plans, ``measurements`` and ``noise`` describe what was seen, ``choice`` decides,
``explanation`` tells it, ``quarantine`` counts crashes.
"""

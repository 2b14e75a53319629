"""Command lines: parse, call, print. The only place that prints, and that turns errors into exit statuses."""

"""Command lines, one task a file; installed as the package ``sae_apps.tasks``."""

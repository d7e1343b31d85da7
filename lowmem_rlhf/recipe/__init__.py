"""What a run is, as one YAML file: schema, loading, overrides, errors. No torch."""

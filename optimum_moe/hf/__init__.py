"""All that touches the registries and the private names of transformers; `import_hook` keeps this file empty."""

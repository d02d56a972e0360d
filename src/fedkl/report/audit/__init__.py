"""What the audit page is made of: ``audit.json`` as facts, pictures, and the places of ink."""

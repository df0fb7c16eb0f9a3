"""The examples do what their kept output says."""

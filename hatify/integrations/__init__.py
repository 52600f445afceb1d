"""What hatify knows of other libraries; each module is imported only when its library already is."""

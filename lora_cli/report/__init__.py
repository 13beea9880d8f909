"""All that people see. Only here, and at the door, is rich imported."""

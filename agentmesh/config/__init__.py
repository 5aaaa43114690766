"""Files to models: meshes and topologies, read with positions, checked, explained."""

"""The engine: settings, plan, hosts and the console. Steps describe, the engine acts."""

from hypothesis import HealthCheck, settings

# How long an example takes depends on who else uses this machine.
settings.register_profile("ours", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ours")

"""bulkhead: any OCI image behind the isolation boundary its workload needs."""

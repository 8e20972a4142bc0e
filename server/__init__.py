"""The HTTP API, the pages for browsers and the webhooks, over a store.

Each line imports only from the lines above it, and from its own; the store and provider_image are below all of them:

    errors, settings, address, record_json, csv_cells
    endpoint, http_client
    status/, live/, auth/
    serializers
    webhooks
    intake/
    context
    api/
    pages/
    app
    process
"""

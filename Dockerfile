# The requestor's image: one image, two commands, `mlg serve` and `mlg batch`; without a command both, under `mlg up`.
#
#   docker build -t mlg .
#   docker run -p 5000:5000 -v mlg:/var/lib/mlg mlg                                      server, batcher and workers
#   docker run -p 5000:5000 -v mlg:/var/lib/mlg mlg mlg serve                            one container each,
#   docker run --no-healthcheck -v mlg:/var/lib/mlg mlg mlg batch                        one volume for both
#
# No tensorflow: models whose weights come from Keras are compiled elsewhere and their folders put into the volume's
# models/. The volume must be a local disk, because SQLite's log needs one.

# Any image with Python 3.11 or newer as python3, its venv module and libstdc++; the same for both stages.
ARG BASE=python:3.11-slim

FROM ${BASE} AS builder
COPY constraints.txt setup.cfg pyproject.toml README.md LICENSE mlg.py /src/
COPY provider_image /src/provider_image
COPY store /src/store
COPY server /src/server
COPY batcher /src/batcher
COPY mlg_client /src/mlg_client
COPY cli /src/cli
COPY scripts/prune_runtime /src/
# pip is not needed in the image, and what openvino has for other devices and formats is not either.
RUN python3 -m venv /opt/mlg \
    && /opt/mlg/bin/python -m pip install --quiet --no-cache-dir --no-compile --constraint /src/constraints.txt /src \
    && /opt/mlg/bin/python -m pip uninstall --quiet --yes openvino-telemetry setuptools \
    && /opt/mlg/bin/python -m pip uninstall --quiet --yes pip \
    && /src/prune_runtime /opt/mlg/lib/python3*/site-packages \
    && python3 -m compileall -q --invalidation-mode unchecked-hash /opt/mlg/lib \
    && mkdir /home-of-mlg

# No RUN from here on: copying leaves no trace of the machine that built it.
FROM ${BASE} AS requestor
COPY --from=builder /opt/mlg/ /opt/mlg/
# Writable for the user below, and by inheritance the volume that docker makes of it.
COPY --from=builder --chown=10001:10001 /home-of-mlg/ /var/lib/mlg/

# MLG_HOST: inside a container 127.0.0.1 can be reached by nobody; what is published is for `docker run -p` to say.
ENV PATH=/opt/mlg/bin:/usr/local/bin:/usr/bin:/bin MLG_HOME=/var/lib/mlg MLG_HOST=0.0.0.0 HOME=/var/lib/mlg \
    PYTHONDONTWRITEBYTECODE=1
VOLUME /var/lib/mlg
WORKDIR /var/lib/mlg
USER 10001:10001
EXPOSE 5000
# For `mlg up` and `mlg serve`; a container that runs `mlg batch` alone has no server: --no-healthcheck.
HEALTHCHECK --interval=30s --timeout=5s --start-period=20s CMD ["python3", "-c", "import os, urllib.request as r; \
r.build_opener(r.ProxyHandler({})).open('http://127.0.0.1:' + os.environ.get('MLG_PORT', '5000') + '/healthz', timeout=4)"]
# Not an entry point, so that `docker run IMAGE mlg batch` reads as it does elsewhere.
CMD ["mlg", "up"]

ARG VERSION=
LABEL org.opencontainers.image.title="mlg" \
    org.opencontainers.image.description="Batch image inference: the HTTP server and the batcher" \
    org.opencontainers.image.licenses="MIT" \
    org.opencontainers.image.version="${VERSION}"

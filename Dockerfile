# The requestor's container image, with the commands `mlg serve` and `mlg batch`; without a command `mlg up` runs both.
#
#   docker build -t mlg .
#   docker run -p 5000:5000 -v mlg:/var/lib/mlg mlg                                      server, batcher and workers
#   docker run -p 5000:5000 -v mlg:/var/lib/mlg mlg mlg serve                            one container each,
#   docker run --no-healthcheck -v mlg:/var/lib/mlg mlg mlg batch                        one volume for both
#
# It has no tensorflow: models whose weights come from Keras are compiled elsewhere, and their folders are copied to the
# volume's models/. The volume must be a local disk, because SQLite's write-ahead log requires one.

# Any image with Python 3.11 or newer as python3, its venv module and libstdc++; the same for both stages. A tag changes
# with each security update: to build the same image again, give a digest: --build-arg BASE=python@sha256:...
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS builder
# For the compiled part of the package, which resizes images. Nothing of the compiler gets into the final image. Where it
# cannot be installed, the image is built without that part, and Pillow resizes.
RUN command -v gcc >/dev/null \
    || { apt-get -qq update && apt-get -qq install --yes --no-install-recommends gcc libc6-dev >/dev/null; } \
    || echo "There is no C compiler: images will be resized by Pillow."
COPY constraints.txt setup.cfg setup.py pyproject.toml README.md LICENSE mlg.py /src/
COPY provider_image /src/provider_image
COPY store /src/store
COPY server /src/server
COPY batcher /src/batcher
COPY mlg_client /src/mlg_client
COPY cli /src/cli
COPY devnet /src/devnet
COPY telegram_bot /src/telegram_bot
COPY trainer /src/trainer
COPY scripts/prune_runtime /src/
# pip and setuptools first, at fixed versions, and no others for building mlg. Removes pip and the parts of openvino for
# other devices and formats, which are not needed. setuptools stays: yapapi, which rents computers, imports its
# pkg_resources.
RUN python3 -m venv /opt/mlg \
    && /opt/mlg/bin/python -m pip install --quiet --no-cache-dir --no-compile --constraint /src/constraints.txt \
        pip setuptools \
    && /opt/mlg/bin/python -m pip install --quiet --no-cache-dir --no-compile --no-build-isolation \
        --constraint /src/constraints.txt /src \
    && /opt/mlg/bin/python -m pip uninstall --quiet --yes openvino-telemetry pip \
    && /src/prune_runtime /opt/mlg/lib/python3*/site-packages \
    && /opt/mlg/bin/python -W ignore -c 'import yapapi' \
    && python3 -m compileall -q --invalidation-mode unchecked-hash /opt/mlg/lib \
    && mkdir /home-of-mlg

# No RUN from here on: copied layers contain nothing of the build machine.
FROM ${BASE} AS requestor
COPY --from=builder /opt/mlg/ /opt/mlg/
# Writable for the user below, as is the volume that is created from it.
COPY --from=builder --chown=10001:10001 /home-of-mlg/ /var/lib/mlg/

# MLG_HOST: in a container 127.0.0.1 is not reachable from outside; `docker run -p` decides what is published.
ENV PATH=/opt/mlg/bin:/usr/local/bin:/usr/bin:/bin MLG_HOME=/var/lib/mlg MLG_HOST=0.0.0.0 HOME=/var/lib/mlg \
    PYTHONDONTWRITEBYTECODE=1
VOLUME /var/lib/mlg
WORKDIR /var/lib/mlg
USER 10001:10001
EXPOSE 5000
# For `mlg up` and `mlg serve`. A container with only `mlg batch` has no server and needs --no-healthcheck.
HEALTHCHECK --interval=30s --timeout=5s --start-period=20s CMD ["python3", "-c", "import os, urllib.request as r; \
r.build_opener(r.ProxyHandler({})).open('http://127.0.0.1:' + os.environ.get('MLG_PORT', '5000') + '/healthz', timeout=4)"]
# No ENTRYPOINT, so that the commands are the same as outside a container: `docker run IMAGE mlg batch`.
CMD ["mlg", "up"]

ARG VERSION=
LABEL org.opencontainers.image.title="mlg" \
    org.opencontainers.image.description="Batch image inference: the HTTP server and the batcher" \
    org.opencontainers.image.licenses="MIT" \
    org.opencontainers.image.version="${VERSION}"

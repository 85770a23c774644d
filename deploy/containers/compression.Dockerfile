# `pollard compress`, `train` and `eval`, for jobs. Build it at the root of the repository:
#
#   docker build -f deploy/containers/compression.Dockerfile -t pollard-compression:0.1.0 .
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/work" pollard-compression:0.1.0 compress --help
#
# As yourself, so that it may write into the folder that is mounted.
FROM python:3.11-slim-bookworm AS build
ARG EXTRAS=cpu
# Where torch comes from: its index for processors brings no CUDA. For GPUs take
# https://download.pytorch.org/whl/cu130 and EXTRAS=gpu.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /source
COPY VERSION constraints.txt ./
COPY protos/python protos/python
COPY runtime runtime
COPY clients/python clients/python
COPY compression compression
RUN python -m venv /opt/pollard \
    && /opt/pollard/bin/pip install --no-cache-dir --constraint constraints.txt \
        --extra-index-url "${TORCH_INDEX}" torch==2.13.0 \
    && /opt/pollard/bin/pip install --no-cache-dir --constraint constraints.txt \
        ./protos/python ./runtime ./clients/python "./compression[${EXTRAS}]" \
    && /opt/pollard/bin/pollard --version

FROM python:3.11-slim-bookworm
RUN groupadd --gid 10001 pollard \
    && useradd --uid 10001 --gid 10001 --home-dir /home/pollard --create-home pollard
COPY --from=build /opt/pollard /opt/pollard
ENV PATH=/opt/pollard/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /work
ENTRYPOINT ["pollard"]
CMD ["--help"]

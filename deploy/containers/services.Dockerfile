# The three services. Build it at the root of the repository:
#
#   docker build -f deploy/containers/services.Dockerfile -t pollard-services:0.1.0 .
#   docker build -f deploy/containers/services.Dockerfile -t pollard-services-gpu:0.1.0 \
#       --build-arg KIND=gpu .
#
# What comes from elsewhere is what was locked, by its hash (`make lock`).
#
# The second needs on its host an NVIDIA driver from 580 on and NVIDIA's container toolkit; CUDA's
# and cuDNN's libraries come from pip.
FROM python:3.11-slim-bookworm AS build
ARG KIND=cpu
WORKDIR /source
COPY deploy/locks deploy/locks
RUN python -m venv /opt/pollard \
    && /opt/pollard/bin/pip install --no-cache-dir --require-hashes \
        --requirement deploy/locks/${KIND}.txt
COPY VERSION ./
COPY protos/python protos/python
COPY runtime runtime
COPY clients/python clients/python
COPY services services
RUN /opt/pollard/bin/pip install --no-cache-dir --no-deps --no-build-isolation \
        ./protos/python ./runtime ./clients/python ./services \
    && /opt/pollard/bin/pip check \
    && /opt/pollard/bin/pollard --version

FROM python:3.11-slim-bookworm
RUN groupadd --gid 10001 pollard \
    && useradd --uid 10001 --gid 10001 --home-dir /var/lib/pollard --create-home pollard
COPY --from=build /opt/pollard /opt/pollard
ENV PATH=/opt/pollard/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
# By number, so that Kubernetes can see that it is not root.
USER 10001:10001
WORKDIR /var/lib/pollard
# inference, preprocess and vision, models
EXPOSE 8001 8011 8021
STOPSIGNAL SIGTERM
ENTRYPOINT ["pollard"]
CMD ["serve", "--help"]

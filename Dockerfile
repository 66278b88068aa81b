FROM node:26-slim AS build
WORKDIR /build
# No install scripts: the only package that has one brings a Node of its own, and this image is one.
COPY package.json package-lock.json .npmrc ./
RUN npm ci --ignore-scripts
COPY tsconfig.json ./
COPY src ./src
# The clients of databases and of Redis are left to who installs the package; in a container nobody can.
RUN npm run build \
  && npm pkg delete devDependencies.pg devDependencies.mysql2 'devDependencies[@redis/client]' \
  && npm pkg set dependencies.pg='*' dependencies.mysql2='*' 'dependencies[@redis/client]=*' \
  && npm prune --omit=dev --ignore-scripts

FROM node:26-slim
# The base image's user "node" holds the uid that bind mounts usually belong to.
RUN userdel node && rm -r /home/node \
  && useradd --uid 1000 --user-group --create-home --shell /usr/sbin/nologin llmproxy \
  && install --directory --owner=llmproxy --group=llmproxy /home/llmproxy/data

WORKDIR /opt/llmproxy
COPY package.json ./
COPY config/llmproxy.* ./config/
COPY --from=build /build/node_modules ./node_modules
COPY --from=build /build/dist ./dist
RUN chmod 755 dist/cli.js && ln -s /opt/llmproxy/dist/cli.js /usr/local/bin/llmproxy

# Numeric: Kubernetes checks runAsNonRoot without the image's list of users.
USER 1000:1000
WORKDIR /home/llmproxy
ENV LLMPROXY_DATA_DIR=/home/llmproxy/data
VOLUME /home/llmproxy/data
EXPOSE 8000

# Liveness, not readiness: a gateway without a backend should not be restarted.
HEALTHCHECK --interval=10s --timeout=3s --start-period=5s --retries=3 \
  CMD ["node", "-e", "fetch('http://127.0.0.1:8000/health').then(answer => process.exit(answer.ok ? 0 : 1), () => process.exit(1))"]

# The exec form: node is process 1 and gets SIGTERM and SIGHUP itself.
# What V8's options are for: docs/performance.md. They are the same in package.json and src/cli.ts.
ENTRYPOINT ["node", "--max-semi-space-size=8", "--heap-growing-percent=60", "--no-memory-reducer", "--v8-pool-size=2", "/opt/llmproxy/dist/cli.js"]
CMD ["serve"]

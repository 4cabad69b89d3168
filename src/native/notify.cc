// SPDX-License-Identifier: Apache-2.0
// Tells the service manager how a service does (sd_notify(3)): Node has no datagrams on unix
// sockets, and another program's would not come from the service's main process.
#include <sys/socket.h>
#include <sys/un.h>

#include <cstddef>
#include <cstring>
#include <string>

#include "addon.h"
#include "arguments.h"
#include "outcome.h"
#include "unique_fd.h"

namespace {

Outcome<Nothing> Send(const std::string& path, const std::string& text) {
  struct sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  if (path.empty() || path.size() >= sizeof(address.sun_path)) {
    return Failure{.error = EINVAL, .call = "sendto"};
  }
  std::memcpy(address.sun_path, path.data(), path.size());
  // An address that is no file begins with a zero, written as @.
  if (path[0] == '@') address.sun_path[0] = '\0';
  UniqueFd fd(socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0));
  if (!fd.valid()) return Failure::Last("socket");
  socklen_t length =
      static_cast<socklen_t>(offsetof(struct sockaddr_un, sun_path) + path.size());
  ssize_t sent = sendto(fd.get(), text.data(), text.size(), MSG_NOSIGNAL,
                        reinterpret_cast<struct sockaddr*>(&address), length);
  if (sent < 0) return Failure::Last("sendto");
  return Nothing();
}

// notifyService(socket: string, text: string)
Napi::Value NotifyService(const Napi::CallbackInfo& info) {
  Arguments arguments(info.Env());
  std::string path = arguments.Text(info[0], "socket");
  std::string text = arguments.Text(info[1], "text");
  if (!arguments.ok()) return {};
  Outcome<Nothing> sent = Send(path, text);
  if (Failure* failure = std::get_if<Failure>(&sent)) {
    failure->ToError(info.Env()).ThrowAsJavaScriptException();
  }
  return info.Env().Undefined();
}

}  // namespace

void ExportNotify(Napi::Env env, Napi::Object exports) {
  exports.Set("notifyService", Napi::Function::New(env, NotifyService, "notifyService"));
}
